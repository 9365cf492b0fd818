"""The roof: from a config to a model, loaders and an optimizer, and to one verb. Only this room joins them."""
