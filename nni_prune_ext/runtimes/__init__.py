"""The programs that run a model, one file each, behind one protocol (see ``base.py``)."""
