"""What people of the field expect of a recommender, over the same runs."""
