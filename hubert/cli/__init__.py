"""The command line of the science; `tasks.cli` adds the service.

May import every package.
"""
