"""What carries a recipe out below `run`: the plan, a recipe's values handed to the parts, sessions, their pushes."""
