"""Graph: the DALI pipeline that decodes each image once and computes the views that a plan asks for.

build       the graph and its inputs
decode      from names or bytes to images: the header check, the decoder, single images of a failed batch
colour      colour, blur and normalisation as DALI operators
views_cpu   views on the CPU, in one pass; colour_cpu: its compiled part
feed        the graph at work: plans in, views out
"""
