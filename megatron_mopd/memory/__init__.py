"""The memory plan: what a layout of a model holds on each GPU and node, before anything is started there."""
