"""The bodies of the stages, one module for each kind."""
