"""Callbacks that write what models say and make.

A module is imported by its own name, because some take seconds to import.
"""
