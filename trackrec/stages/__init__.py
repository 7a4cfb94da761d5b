"""One module a stage: read inputs, call the domain modules, write outputs. This is what a component calls."""
