"""Evidence that a model forgot: what models say of every sample, and the figures that follow from it."""
