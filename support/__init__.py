"""What a learner need not read, so that lessons stay short."""
