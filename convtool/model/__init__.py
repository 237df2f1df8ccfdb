"""Whole models: loading one, reading its layers' geometry, tracing its data flow, planning and making its fusions.

Only this part of convtool runs a user's own code, and only where the user names a model.
"""
