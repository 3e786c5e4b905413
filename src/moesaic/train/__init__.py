"""Teaching a model: recipe, loop, loss, optimizer, schedule, and the way back after a stop."""
