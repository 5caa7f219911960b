/* A video is sent as the file it is; its frames are shown as far as this browser can. */
async function takeVideo(file) {
  if (!file) return;
  const element = document.createElement("video");
  element.muted = true;
  element.preload = "auto";
  $("status").textContent = `Reading ${file.name}.`;
  const url = await dataUrl(file);
  const isShown = await new Promise((found) => {
    element.addEventListener("loadeddata", () => found(element.videoWidth > 0));
    element.addEventListener("error", () => found(false));
    element.src = url;
  });
  video = { url, element: isShown ? element : null };
  element.addEventListener("seeked", () => drawFrame(element));
  fit(isShown ? element : document.createElement("canvas"), element.videoWidth || 320, element.videoHeight || 180, false);
  describe(`Video ${file.name}`);
  $("status").textContent = isShown
    ? `${file.name} is ready.` : `${file.name} will be sent, but this browser cannot show it.`;
  fail("");
}

function dataUrl(file) {
  return new Promise((read, failed) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => read(reader.result));
    reader.addEventListener("error", () => failed(reader.error));
    reader.readAsDataURL(file);
  });
}

/* Goes to the middle of the part of the video that a frame of the server's stands for; returns the second, if known. */
function seek(frame, numFrames) {
  const element = video?.element, second = element?.duration * (frame + .5) / numFrames;
  if (!Number.isFinite(second)) return undefined;
  element.currentTime = second;
  return second;
}

/* Every time the video has got where it was sent: a seek that overtakes another ends once more. */
function drawFrame(element) {
  if (video?.element !== element) return;
  sent.getContext("2d").drawImage(element, 0, 0, sent.width, sent.height);
  $("picture").getContext("2d").drawImage(sent, 0, 0, $("picture").width, $("picture").height);
}
