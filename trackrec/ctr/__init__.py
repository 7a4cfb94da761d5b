"""RecCoTs as features of ranking models: seven CTR backbones, the connector, and training many models together."""
