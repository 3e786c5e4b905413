"""What this machine can do, what bound that sets to a model, and what of the bound its engine reaches."""
