"""A trained adapter: found on disk or on the Hub, its weights, loaded on its base, prompted as it was trained."""
