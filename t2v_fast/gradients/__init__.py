"""From a forward pass to per-example squared gradients: who owns which row, rules for layers, the recorder."""
