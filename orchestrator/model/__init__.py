"""Base models: loaded, resized, adapted, merged, and the loss they learn by."""
