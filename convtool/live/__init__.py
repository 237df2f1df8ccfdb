"""Live models: loading one, reading its layers off it, tracing a run, planning its fusions and putting them in.

Only this part of convtool runs a user's own code or touches an nn.Module, and only where the user names a model.
"""
