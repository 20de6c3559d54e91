"""What a recipe's data, its noise, its finished runs and this machine are, without training."""
