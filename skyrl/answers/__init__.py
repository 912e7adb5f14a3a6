"""Final answers of mathematics: their expressions, and whether two of them are the same. Pure functions of text."""
