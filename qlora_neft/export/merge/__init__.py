"""An adapter and its base merged into one plain model, with proof that it is the model that was trained."""
