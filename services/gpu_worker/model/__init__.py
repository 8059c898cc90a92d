"""The frozen backbone: configuration, weights, adapters resident on the device, one decoder for a family."""
