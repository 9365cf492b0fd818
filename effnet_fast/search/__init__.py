"""Which scaled models to train, who trains which, and what follows from their accuracy. Trains nothing itself."""
