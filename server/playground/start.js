/* The start. */
async function meet() {
  const card = (await (await send("v1/models")).json()).data[0];
  model = card.id;
  own = card.hidrop;
  const methods = own?.request_methods ?? [];
  $("method").replaceChildren(...methods.map((name) => new Option(name, name, false, name === own.method)));
  showKeeps();
  showMedia();
  const preset = own?.preset ? `, preset ${own.preset}` : "";
  $("about").textContent =
    `${model}: method ${own.method}${preset}, ${own.schedule.num_layers} layers in ${own.stages.length} stages`;
}

function takes(modality) {
  return own?.modalities?.includes(modality) ?? modality === "image";
}

/* What the model takes, and the picture as it is sent to this one. */
function showMedia() {
  $("image-part").hidden = !takes("image");
  $("video-part").hidden = !takes("video");
  if (own?.pictures === "any size") {
    const ofVideos = takes("video") ? " Videos are sent as they are." : "";
    $("fitting").textContent =
      `Or drop one on the frame. It is sent as you see it: whole, no side over ${MOST_PIXELS} pixels.${ofVideos}`;
  }
  if (!video) fit(...given);
}

/* The server's own keeps as an example, where they are those of the chosen method. */
function showKeeps() {
  const keeps = own?.stages?.map((stage) => stage.keep).join(", ");
  $("keep").placeholder = own && $("method").value === own.method ? keeps : "the method's own";
}

$("method").addEventListener("change", showKeeps);
$("file").addEventListener("change", (event) => takeFile(event.target.files[0]));
$("video").addEventListener("change", (event) => takeVideo(event.target.files[0]));
$("example").addEventListener("click", drawExample);
$("form").addEventListener("submit", (event) => { event.preventDefault(); askAll(); });
$("stop").addEventListener("click", () => aborter?.abort());
$("stage").addEventListener("input", showStage);
$("frame").addEventListener("input", showFrame);
$("tiles").addEventListener("change", showStage);
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragenter" || type === "dragover");
    if (type === "drop") takeFile(event.dataTransfer.files[0]);
  });
}
drawExample();
meet().catch((error) => { $("about").textContent = `The server did not say what it serves (${error.message}).`; });
