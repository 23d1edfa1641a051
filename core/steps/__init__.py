"""What the components call, a module a component: URIs and settings in, a publication and a report out.

A step that is published already computes nothing. Heavy libraries are imported by the step that needs them.
"""
