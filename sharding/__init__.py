"""Where the model is computed, and what that costs."""
