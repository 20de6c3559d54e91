"""A training step on a GPU, measured by one command: ours, and what others make of the same base and rows.

`plan` says what is measured, `conduct` runs it in processes of their own (`session`), `report` and `plots` write what
came out.
"""
