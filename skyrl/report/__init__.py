"""What a run says in a terminal and on paper: its state, its curves, where two part, and a step of it again."""
