"""What devices send: integers of bounded norm, in a ring where they can be summed."""
