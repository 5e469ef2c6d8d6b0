"""Graph: the DALI pipeline that decodes each image once and paints the views that a plan asks for."""
