"""A page and a JSON endpoint that try a trained network."""
