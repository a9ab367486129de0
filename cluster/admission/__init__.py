"""Who is let in, and in which order: keys, limits, fair queueing, capacity. No Ray, clock or I/O.

Time is always an argument: seconds of one monotonic clock, and days of UTC where a limit is of
a day.
"""
