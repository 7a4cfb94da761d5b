"""stub"""

TIES = ()
