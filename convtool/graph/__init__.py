"""Data flow as steps of operations: the linear stretches in a run, and what to make one layer of."""
