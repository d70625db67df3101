"""What both scripts share with diffusers' official DreamBooth scripts. Knows nothing of the penalty."""
