# Chooses CMAKE_CUDA_ARCHITECTURES by the version of nvcc: JetPack 6 has 12.6, which knows no
# Blackwell. A device of a later minor version runs the code of an earlier one: 12.0's on 12.1.
set(CMAKE_CUDA_ARCHITECTURES 75 80 86 87 89 90)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND CMAKE_CUDA_ARCHITECTURES 100 120)
endif()
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13.0)
  list(APPEND CMAKE_CUDA_ARCHITECTURES 110)  # Jetson Thor
endif()
message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION}, compute capabilities: ${CMAKE_CUDA_ARCHITECTURES}")
