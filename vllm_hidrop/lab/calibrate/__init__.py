"""The schedule search of HiDrop: four training-free curves of a model, and the schedule they suggest.

``samples`` reads pictures and questions, ``checkpoint`` runs the model, ``recording`` hooks its layers, ``curves``
averages over samples, ``proposal`` is arithmetic on the averages, ``figure`` draws.
"""
