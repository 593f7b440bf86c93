"""`bsa-vision bench`: one attention call or a whole model, compared with its peers in one run.

case -> implementations -> reference -> attention, models -> report, plot
"""
