"""The pure model: tensors and its configuration, no files, no text, no devices."""
