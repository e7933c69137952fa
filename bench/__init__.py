"""The benchmark: workloads, contenders, timing, memory, the SimMIM run and the report. Run by ``fastattn bench`` and
``fastattn demo``."""
