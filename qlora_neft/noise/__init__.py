"""NEFTune noise and the random streams it is drawn from."""
