"""The report of a run: the claim, what it rests on, accuracy and costs, for people and programs."""
