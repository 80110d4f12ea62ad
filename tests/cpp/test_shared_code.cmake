# Guards that no function is shared by files that are compiled for different instruction sets: of a function that several
# of them compile under one name, the linker keeps any one, and then older processors meet instructions that they lack.
# NM is the program; OBJECTS are object files, separated by colons.
string(REPLACE ":" ";" objects "${OBJECTS}")
list(FILTER objects INCLUDE REGEX "/cpu/backend/[^/]*$")
list(FILTER objects EXCLUDE REGEX "/isa\\.cpp")
list(LENGTH objects count)
if(count LESS 2)
  message(FATAL_ERROR "expected the objects of two instruction sets or more, got \"${OBJECTS}\"")
endif()
foreach(object IN LISTS objects)
  execute_process(COMMAND ${NM} -C ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9a-f]+ W [^\n]*" shared "${symbols}")
  foreach(symbol IN LISTS shared)
    message(SEND_ERROR "${object}: ${symbol}")
  endforeach()
endforeach()
