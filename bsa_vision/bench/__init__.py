"""The benchmark: attention alone and whole models against their peers, in one run, with checked results.

    case → ways → correct → attention, models → report, plot → command

`bsa-vision bench` is the command line of it. Times are ratios within one run (`bsa_vision.measure.timing.paired`).
"""
