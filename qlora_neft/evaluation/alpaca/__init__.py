"""AlpacaEval: answers, a judge, win rates."""
