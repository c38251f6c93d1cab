"""nano's pictures and questions, each from a seed: `studio.Studio.sample`."""
