"""Compare a personalized pipeline with its base: how well it shows the subject, and how far it drifted."""
