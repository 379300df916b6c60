"""What a training is worth: validation losses, ABX, quality of units, and the choice of checkpoint and layer.

May import the packages before it, up to `training`.
"""
