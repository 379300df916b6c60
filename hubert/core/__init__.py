"""What every other package stands on: errors, files, hashes, processes, frames, text, and the `Stage`.

Imports nothing of this project.
"""
