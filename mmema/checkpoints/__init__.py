"""EMA state on disk: reading, reports, export, conversion, and the file that a run resumes from.

Importing ``mmema`` loads ``torch_load``, ``resume`` and ``folders`` only. The functions for people
stand in modules of their own: ``report.inspect``, ``export.export``, ``convert.convert``,
``files.load``.
"""
