"""What personalising did to a pipeline: how well it draws the subject, and how far it drifted from its base."""
