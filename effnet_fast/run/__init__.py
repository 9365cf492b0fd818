"""One module per verb, and the steps of a training run. Only this package combines data, models and training."""
