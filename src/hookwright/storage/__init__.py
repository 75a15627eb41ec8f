"""Where it all lives: the contract and its implementations."""
